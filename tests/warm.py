"""What every rank of a test needs loaded."""

import megalowrank.engine.setup  # noqa: F401
import megalowrank.quiet  # noqa: F401
