"""The loop of all that learns from given answers: replies, judgements, ratings, classes.

A task (sft.SFTTask, comparisons.RewardTask, classify.ClassTask) has the model `core`, its
`tokenizer`, and loss(model, step), validate(model), finish(); it names its `loss_name` and the
validation's `metric`, of which more is better. What is validated and kept is a moving average of
the weights.
"""

import math

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nanokl import checkpoint, metrics, optim, training
from nanokl import runtime as rt


def supervise(flags, make_task) -> None:
    """The whole run of a task: early stop on validation, test numbers.

    flags are a script's `Supervised`, make_task such as sft.SFTTask.
    """
    # 1. Model, data, yardstick (wrong flags show), optimisers; on --resume their state.
    runtime = rt.setup(flags.device, flags.dtype)
    task = make_task(flags, runtime)
    core, tokenizer = task.core, task.tokenizer
    speed = {name: flags.trunk_lr for name, _ in core.named_parameters() if "trunk." in name}
    optimizers = optim.make_optimizers(core, lr=flags.lr, muon_lr=flags.muon_lr, betas=(0.9, 0.98),
                                       weight_decay=flags.weight_decay, dtype=runtime.dtype,
                                       speed=speed)
    average = AveragedModel(core, multi_avg_fn=get_ema_multi_avg_fn(0.98))  # steadier than core
    metric = f"val_{task.metric}"
    start, best, last = 0, {"step": 0, metric: -1.0}, False
    if training.open_run(flags, runtime):
        state = training.load_last(flags.out, core, optimizers, tokenizer=tokenizer)
        start, best, last = state["step"], state["best"], state["last"]
        average.load_state_dict(state["average"])
    model = runtime.wrap(core)
    log = metrics.Log(flags.out, total=flags.steps, unit="step", is_main=runtime.is_main,
                      resume_step=start)
    # 2. Gradient steps; now and then the validation texts. The best and the last model are kept.
    with training.nothing_half_written(flags.out, runtime), log, rt.Interrupt() as interrupt:
        for step in range(start + 1, (start if last else flags.steps) + 1):
            core.train()
            training.seed_step(flags.seed, step, runtime)
            optim.set_lr(optimizers, optim.lr_scale(step - 1, flags.steps, warmup=flags.warmup,
                                                    decay=flags.decay))
            loss = task.loss(model, step - 1)
            training.gradient_step(loss, core.parameters(), optimizers, step=step, out=flags.out,
                                   max_grad_norm=math.inf)  # one norm would tie the parts together
            average.update_parameters(core)
            log.step(step, **{task.loss_name: runtime.mean(loss.detach()).item()})
            stop, last = runtime.any(interrupt.set), step == flags.steps
            if step % flags.eval_every == 0 or last:
                report = {f"val_{key}": x for key, x in task.validate(average.module).items()}
                log.event(step, **report)
                training.check_finite(all(map(math.isfinite, report.values())), step, flags.out)
                if report[metric] > best[metric]:
                    best = {"step": step, metric: report[metric]}
                    if runtime.is_main:
                        checkpoint.save(flags.out / "best", average.module, tokenizer=tokenizer)
                last = last or step - best["step"] >= flags.patience * flags.eval_every
            if runtime.is_main and (stop or last or step % flags.eval_every == 0):
                training.save_last(flags.out, core, optimizers, tokenizer=tokenizer, step=step,
                                   best=best, last=last, average=average.state_dict())
            start = step
            if last:
                break
            if stop:
                runtime.barrier()  # the main process has saved
                training.leave(interrupt, log, step, flags.out)
        # 3. The best model on the test texts or conversations.
        runtime.barrier()
        report = task.finish()
        log.close({"best_step": best["step"], "steps": start, "seed": flags.seed, **report})
