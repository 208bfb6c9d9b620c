"""Words in, words out: options to requests, documents to text."""
