"""Parts of backends that run a whole sequence with one operator: plans, operators, and the conversion of states."""
