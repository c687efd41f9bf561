"""Plans: which row holds which query, and which slot holds which key."""
