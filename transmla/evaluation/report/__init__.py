"""`transmla report`: one page with tables and pictures of results."""
