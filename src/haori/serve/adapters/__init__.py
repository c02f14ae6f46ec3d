"""From the name in a request to factors in a batch, in four steps.

directory    a model name -> content ids and files     with blend, registered, library_watch
reading      configuration, header, tensors -> factors in the form that all methods share    with plan, refusals
packed       factors -> one stretch of memory; tiers decides which adapters are in memory
multi_lora   packed adapters -> the updates of every row of a step
"""
