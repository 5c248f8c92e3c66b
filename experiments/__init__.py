"""Experiments: scripts that read top to bottom, one per table or figure, run by the `orderppl` command."""

if __name__ != "orderppl.experiments":
    raise ImportError("import orderppl.experiments, not experiments")
