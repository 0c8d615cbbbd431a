"""ElasticTok (arXiv 2410.08368)."""
