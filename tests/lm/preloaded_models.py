"""What ranks that train models of transformers import as they go, seconds for each."""

import tiny

tiny.model()
