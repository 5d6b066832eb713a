"""The commands: flags, what is printed, and errors as one line."""
