"""Everything that is done to a network or with it: data, training, evaluation, drawing, command lines."""
