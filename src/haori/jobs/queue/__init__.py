"""The queue of jobs: what is submitted, claimed by workers, run in processes of its own, and what came of it."""
