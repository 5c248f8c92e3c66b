"""Placeholder."""
if __name__ != "orderppl.guides":
    raise ImportError("import orderppl.guides, not guides")
