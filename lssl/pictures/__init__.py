"""Pictures: what a network is shown, what it makes of it, and how a run went; one kind per file, PNGs by matplotlib."""
