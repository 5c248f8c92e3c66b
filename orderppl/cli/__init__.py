"""The `orderppl` command: one file per subcommand."""
