"""What every run imports, once, before the runs are forked; libraries do not remark on what they lack."""

import importlib
import logging
import os
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
for name in ("torch.optim", "transformers.models.bert.modeling_bert", "rankfold"):
    importlib.import_module(name)
