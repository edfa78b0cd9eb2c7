"""The work of each subcommand: `add_arguments(parser)` and `run(args) -> exit code`, imported when called."""
