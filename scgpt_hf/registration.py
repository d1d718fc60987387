"""Register the model with the Auto classes of transformers, without importing transformers before the user does.

torch and transformers take seconds to import. So importing `scgpt_hf` imports neither; it watches the import of
transformers instead. The model is registered once the Auto classes have been imported, and before the statement that
imported them continues. So `AutoModel.from_pretrained` knows models of scgpt after `import scgpt_hf`, in any order.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import FileLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO_CLASSES = "transformers.models.auto.configuration_auto"
# Registering imports these packages. They must not be registered while one of their modules is half imported.
_WATCHED = ("transformers", "scgpt_hf.model", "scgpt_hf.tokens")


def register_with_transformers() -> None:
    """Register the model now, if the Auto classes have been imported already, or as soon as they are."""
    if _AUTO_CLASSES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _ImportWatcher())


class _ImportWatcher(MetaPathFinder):
    """Calls `_register` when the outermost import of a watched module ends, and the Auto classes are among them."""

    def __init__(self) -> None:
        self._depth = 0  # watched modules that are being imported, one within the other

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a watched module through the other finders, and note when it has been executed."""
        if not any(name == package or name.startswith(f"{package}.") for package in _WATCHED):
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and isinstance(spec.loader, FileLoader):  # a loader of one module; others may be shared
            spec.loader.exec_module = self._count(spec.loader.exec_module)  # type: ignore[assignment,method-assign]
        return spec

    def _count(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        """Return a function that executes a module; the one that ends last registers the model."""

        def run(module: ModuleType) -> None:
            self._depth += 1
            try:
                execute(module)
            finally:
                self._depth -= 1
            if self._depth == 0 and _AUTO_CLASSES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        return run


def _register() -> None:
    """Register the model and its processor with the Auto classes, for `model_type: scgpt`."""
    import transformers

    from scgpt_hf.model.configuration_scgpt import ScGPTConfig
    from scgpt_hf.model.modeling_scgpt import (
        ScGPTForPerturbation,
        ScGPTForPreTraining,
        ScGPTForSequenceClassification,
        ScGPTModel,
    )
    from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

    transformers.AutoConfig.register(ScGPTConfig.model_type, ScGPTConfig)
    transformers.AutoModel.register(ScGPTConfig, ScGPTModel)
    transformers.AutoModelForPreTraining.register(ScGPTConfig, ScGPTForPreTraining)
    transformers.AutoModelForMaskedLM.register(ScGPTConfig, ScGPTForPreTraining)
    transformers.AutoModelForSequenceClassification.register(ScGPTConfig, ScGPTForSequenceClassification)
    # There is no Auto class for perturbations. This one stands for models that predict one number for each token.
    transformers.AutoModelForTokenClassification.register(ScGPTConfig, ScGPTForPerturbation)
    transformers.AutoProcessor.register(ScGPTConfig, ScGPTProcessor)  # type: ignore[no-untyped-call]
