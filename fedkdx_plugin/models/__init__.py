"""Built-in models, each with a feature extractor and a head (`registry.interface.Model`)."""
