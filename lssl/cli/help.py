"""What ``lssl --help`` and ``lssl fit --help`` print: a screenful each; nothing is imported for it."""

from __future__ import annotations

from lssl import __version__

__all__ = ["COMMANDS", "HELP", "OPTIONS", "command_help"]

#: Commands that go to LightningCLI, and what each does.
COMMANDS = {
    "fit": "Pretrains with a strategy, or fine-tunes a Segmenter, ChangeSegmenter, Classifier or Regressor.",
    "validate": "Computes a strategy's terms, or the scores of what was fine-tuned, on held-out subjects.",
    "test": "Computes a strategy's terms, or the scores of what was fine-tuned, on test subjects.",
    "predict": "Writes a strategy's embeddings, a segmenter's label maps, or a Classifier's or Regressor's answers.",
}

HELP = f"""\
lssl {__version__}: self-supervised pretraining on longitudinal 3D neuroimages

  lssl fit      --config NAME --data PATH [--key value …]          pretrain, or train a Segmenter, Classifier, Regressor
  lssl validate --config NAME --ckpt_path FILE|best|last           a strategy's terms or a task's scores, held out
  lssl test     --config NAME --ckpt_path FILE|best|last           the same of test subjects: tables and pictures
  lssl predict  --config NAME --ckpt_path FILE|best|last           embeddings; or label maps, classes, numbers
  lssl segment  IMAGE [IMAGE …] --weights RUN -o DIR               label maps and volumes of scans by a Segmenter
  lssl show     RUN [RUN …]                                        what runs logged: tables, curves, side by side
  lssl prepare  BIDS_DIR OUT_DIR [--suffix T1w …] [--workers N]    registered, cached visits from a BIDS folder
  lssl inspect  DIR [--json] [--sheet FILE.png]                    what a BIDS or prepared folder holds
  lssl import   FILE OUT [--spacing MM]                            a table of visits from nnssl's JSON or an HDF5 file
  lssl benchmark --config NAME [--dry-run] [--jobs N] [--report]   strategies side by side, in one table
  lssl tune     --config NAME --data PATH [--minutes 2]            settings that make it faster here, and what to type
  lssl profile  --config NAME --data PATH [--steps N]              where a step's time goes: table, operations, trace
  lssl trajectories RUN DATA [--group COLUMN]                      volumes and embeddings over age, by subject and group
  lssl export   RUN OUT [--to monai|nnunet|safetensors|onnx|lssl]  weights for other programs, verified without lssl
  lssl strategies [NAME]                                           the methods; one with its options and recipes
  lssl datamodules [NAME]                                          the sources of pairs; one with its options
  lssl completion bash|zsh|fish                                    Tab completes: eval "$(lssl completion bash)"

  NAME    a config file, or a shipped recipe: longitudinal_local, finetune, benchmark/demo; later ones override earlier
  PATH    a prepared folder, a BIDS folder, a table of visits (CSV) or one NIfTI file; or a class: PhantomDataModule

  lssl fit --help                          the options that are used most; --help=all lists all
  lssl fit --config NAME --print_config    what NAME resolves to; --print_config=sources says where each value is from
  lssl --version                           versions and devices, for a bug report

Options override --data, and --data overrides configs, in any order of the arguments."""

#: The options that are used most, and what each does.
OPTIONS = {
    "config": "a YAML file, or a shipped recipe by its name; several merge in their order",
    "data": "a prepared or BIDS folder, a table of visits, one NIfTI file, or a class",
    "ckpt_path": "checkpoint to resume from or to evaluate: a file, best or last",
    "model": "a strategy, lssl.Segmenter, ChangeSegmenter, …; option: --model.init_args.NAME",
    "model.init_args.pretrained": "checkpoint that a Segmenter, Classifier and the like start from",
    "model.init_args.loss_weights": "weight of each term: {reconstruction: 0} switches one off",
    "data.init_args.batch_size": "pairs per step and device",
    "data.init_args.num_workers": "processes that read visits",
    "data.init_args.split": "shares of subjects in train, val and test: [0.8,0.1,0.1]",
    "views.size": "voxels of a view along each axis",
    "backbone": "the network: --config network/swin_unetr, or --backbone.network CLASS",
    "trainer.max_steps": "length of the run",
    "trainer.devices": "number of GPUs",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed",
    "trainer.check_val_every_n_epoch": "epochs from one validation to the next",
    "trainer.default_root_dir": "the run folder",
    "monitor.every": "steps between two measurements of the representation; 0: none",
    "print_config": "shows what all this resolves to; =sources says where each value is from",
    "help": "this text; =all lists every option of every group",
}
EXAMPLES = {
    "fit": (
        "lssl fit --config demo",
        "lssl fit --config longitudinal_infonce --data PATH --views.size 64 --trainer.max_steps 20000",
        "lssl fit --config finetune --data PATH --model.init_args.pretrained runs/demo/checkpoints/last.ckpt",
    ),
    "validate": ("lssl validate --config runs/demo/config.yaml --ckpt_path best",),
    "test": ("lssl test --config runs/demo/config.yaml --ckpt_path best",),
    "predict": ("lssl predict --config runs/finetune/config.yaml --ckpt_path best --data PATH",),
}
TRAINING = ("model.init_args", "trainer.max_steps", "trainer.check_val", "monitor")  # of fit alone


def command_help(command: str) -> str:
    """A screenful on a command of :data:`COMMANDS`."""
    rows = {name: text for name, text in OPTIONS.items() if command == "fit" or not name.startswith(TRAINING)}
    return "\n".join(
        [
            f"lssl {command} --config NAME [--config NAME …] [--data PATH] [--key value …]",
            "",
            COMMANDS[command],
            "",
            *(f"  --{name:<35}{text}" for name, text in rows.items()),
            "",
            *(f"  {line}" for line in EXAMPLES[command]),
            "",
            "  lssl strategies NAME, lssl datamodules NAME    the options of one class, and its recipes",
            f"  {f'lssl {command} --help=all':<47}every option (long)",
        ]
    )
