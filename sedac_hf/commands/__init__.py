"""One file for each subcommand of `sedac`: its arguments and its help. The work is elsewhere."""
