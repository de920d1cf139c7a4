"""What users would pick instead, measured beside this project: ``make bench-peers``."""
