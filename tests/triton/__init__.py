"""The Triton backend against the reference: on a GPU where there is one, through Triton's interpreter elsewhere."""
