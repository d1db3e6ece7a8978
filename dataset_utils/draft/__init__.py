"""Drafts of the YAML file that describes somebody's own recordings, from the files themselves."""
