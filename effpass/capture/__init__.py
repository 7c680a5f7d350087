"""Capture: the two doors. ``known`` takes library functions before Dynamo traces into them;
``dynamo`` turns Dynamo's graph into the pre-dispatch ATen graph that every rewrite works on."""
