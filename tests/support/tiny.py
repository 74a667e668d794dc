"""The tiny models that strategy authors get too, under the name that tests know."""

from service.testing.tiny import ARCHITECTURES as ARCHITECTURES
from service.testing.tiny import CHATML as CHATML
from service.testing.tiny import HEAD_SIZE as HEAD_SIZE
from service.testing.tiny import HEADS as HEADS
from service.testing.tiny import HIDDEN as HIDDEN
from service.testing.tiny import IM_END as IM_END
from service.testing.tiny import IM_START as IM_START
from service.testing.tiny import KV_HEADS as KV_HEADS
from service.testing.tiny import MAX_CONTEXT as MAX_CONTEXT
from service.testing.tiny import SLIDING_WINDOW as SLIDING_WINDOW
from service.testing.tiny import VOCAB as VOCAB
from service.testing.tiny import save_tiny as save_tiny
from service.testing.tiny import tiny_config as tiny_config
from service.testing.tiny import tiny_model as tiny_model
from service.testing.tiny import tiny_tokenizer as tiny_tokenizer
