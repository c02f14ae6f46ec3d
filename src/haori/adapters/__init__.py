"""What the package adds around PEFT's adapters: building and inserting them, method by method.

Each method is one file with a function that turns its part of the recipe into a PEFT configuration.
"""
