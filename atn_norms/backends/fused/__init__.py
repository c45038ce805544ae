"""Parts of backends that run a whole sequence by one operator: plans, operators, states in and out."""
