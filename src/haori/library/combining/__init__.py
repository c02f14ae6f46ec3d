"""Adapters made from adapters and checkpoints: blended, resized, extracted; and the proof and card of what was made.

factors     B A of an update, truncated, with the energy kept     energy      what truncation kept, by module
weighing    TIES, DARE and KnOTS over the changes of a module     blending    several adapters as one
resizing    one adapter at another rank                           extracting  the difference of two checkpoints
base_weights  one weight of a base at a time                      storing     proved, and into the library
"""
