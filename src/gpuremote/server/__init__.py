"""The device server: a daemon that takes connections, and one worker process per session."""
