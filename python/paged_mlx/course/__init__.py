"""Reports of the course chapter that the library began as."""
