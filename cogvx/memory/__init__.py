"""In the memory that there is: plans, what they are predicted to hold, and how they are run."""
