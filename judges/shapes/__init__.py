"""The embedded world: a prompt grammar, a renderer and an exact oracle that need no download."""
