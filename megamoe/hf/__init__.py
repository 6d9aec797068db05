"""megamoe's own architecture for transformers: `import megamoe.hf` makes the Auto classes know model_type "megamoe".

Folders that `megamoe convert to-hf` writes carry the same two files and load without megamoe through
`trust_remote_code=True`. Nothing else of megamoe imports this package; it is the one that imports transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from megamoe.hf.configuration_megamoe import MegamoeConfig
from megamoe.hf.modeling_megamoe import MegamoeForCausalLM, MegamoeForSequenceClassification, MegamoeModel

__all__ = ["MegamoeConfig", "MegamoeForCausalLM", "MegamoeForSequenceClassification", "MegamoeModel"]

AutoConfig.register(MegamoeConfig.model_type, MegamoeConfig, exist_ok=True)
AutoModel.register(MegamoeConfig, MegamoeModel, exist_ok=True)
AutoModelForCausalLM.register(MegamoeConfig, MegamoeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MegamoeConfig, MegamoeForSequenceClassification, exist_ok=True)
# save_pretrained then copies the two files along, so that what is fine-tuned here loads elsewhere, too.
MegamoeConfig.register_for_auto_class()
MegamoeModel.register_for_auto_class("AutoModel")
MegamoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MegamoeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
