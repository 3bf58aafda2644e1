"""Models: the source's layers, loading, generation, and the class that ships inside converted folders."""
