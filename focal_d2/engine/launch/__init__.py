"""The processes of a job: how they start, end together and communicate."""
