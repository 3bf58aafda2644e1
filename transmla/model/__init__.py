"""Models: layers of the source, loading, generation, and the class that is copied into converted folders."""
