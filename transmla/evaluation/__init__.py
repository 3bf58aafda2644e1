"""Measures a converted model beside its source: perplexity with its error, and what the cache really holds."""
