"""The model room: loading, the packed engine, generation, saving."""
