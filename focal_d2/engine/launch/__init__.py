"""The processes of a job: starting them, ending them together, and what they tell each other."""
