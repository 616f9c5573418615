"""What every room may use to read and write files: safely, and without running what they hold."""
