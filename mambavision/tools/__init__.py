"""The commands that look at a model or a machine: eval, predict, info, doctor.

    cli        their arguments, light enough for `--help`
    source     a model, its labels and its preprocessing, from a checkpoint or the published weights
    evaluate   accuracy on labelled pictures
    predict    the classes of pictures, and what the stages see
    info       parameters, operations, memory
    doctor     versions, backends, a short self-check
"""
