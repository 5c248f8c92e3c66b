"""Placeholder."""
if __name__ != "orderppl.models":
    raise ImportError("import orderppl.models, not models")
