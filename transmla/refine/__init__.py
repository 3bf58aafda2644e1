"""Gradient refinement of converted attention: layer by layer against the source's stream, then through many layers
against its predictions. Only attention weights move; norms, MLPs, embeddings and head stay the source's."""
