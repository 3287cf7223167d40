"""The ops that update a state in place: the same rooms as those of the package (ops, reference, launch) once more, for inference alone."""
