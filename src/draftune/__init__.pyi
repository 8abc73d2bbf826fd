# The public names of draftune, each listed once: type checkers read this file, and __init__.py imports by it.
from draftune.errors import DraftuneError as DraftuneError
from draftune.experimental.distill import distill_lora as distill_lora
from draftune.experimental.tune_weights import tune_weights as tune_weights
from draftune.guidance.noise_optimization import optimize_noise as optimize_noise
from draftune.guidance.sample import sample_guided as sample_guided
from draftune.lora import load_lora as load_lora
from draftune.lora import save_lora as save_lora
from draftune.lora import set_lora_scale as set_lora_scale
from draftune.methods import Batch as Batch
from draftune.methods import Method as Method
from draftune.methods import load_method as load_method
from draftune.models import load_model as load_model
from draftune.report import write_report as write_report
from draftune.rewards import Reward as Reward
from draftune.rewards import load_reward as load_reward
from draftune.runs.export import export_lora as export_lora
from draftune.runs.merge import merge_loras as merge_loras
from draftune.sampling.schedule import Schedule as Schedule
from draftune.settings import Settings as Settings
from draftune.training import Callback as Callback
from draftune.training import Run as Run
from draftune.training import Trainer as Trainer
from draftune.training import train as train

__version__: str
__all__: list[str]
