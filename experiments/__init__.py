"""Placeholder."""
if __name__ != "orderppl.experiments":
    raise ImportError("import orderppl.experiments, not experiments")
