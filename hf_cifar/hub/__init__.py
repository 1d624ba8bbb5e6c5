"""The Hugging Face Hub: check the connection, fetch files, identify origins, push models."""
