"""The prediction server: HTTP in one process, and the model in others.

server starts `workers`; `app` answers requests, whose images `uploads` extracts and `workers` sends to a
worker process, in the form of `frames`; `worker` decodes them, runs the model, and answers.
"""
