"""The conformance suite judged: wrong subjects that it must catch, right ones that it must pass, and its manners."""
