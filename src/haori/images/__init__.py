"""Pictures from a base and adapters: prompts with tags, adapters put on a pipeline, generation.

Exports are lazy: importing the package loads neither torch nor diffusers.
"""
