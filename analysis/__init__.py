"""Where and when features repeat, how far pictures differ, and what it costs."""
