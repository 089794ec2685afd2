"""The finished dataset: merged files, the manifest, validation, statistics."""
