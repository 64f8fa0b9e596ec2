"""A fleet on GPUs: pools, engines, gateway, timings and cost of the targets aws and kubernetes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from infra.config import PoolConfig
from infra.findings import did_you_mean, show
from infra.plan.aws import plan_aws
from infra.plan.budget import check_budget
from infra.plan.candidates import World
from infra.plan.capacity import check_drain, note_spot
from infra.plan.charges import by_use, charged, parts
from infra.plan.choice import explain as explain_choice
from infra.plan.choice import limits, ranked
from infra.plan.cost import (
    Charged,
    Rented,
    Served,
    Traffic,
    capacity,
    fall,
    host_rent,
    note_overload,
    plan_cost,
    pool_rent,
)
from infra.plan.engines import OFFLINE, gpu_flags
from infra.plan.gateway import listening, plan_gateway, thresholds
from infra.plan.gpu_models import Chosen, ask_of, choose_model, explain_model
from infra.plan.model import (
    AgentPlan,
    AwsPlan,
    AwsTimings,
    CostPlan,
    EngineSetPlan,
    FleetPlan,
    GatewayPlan,
    KubernetesTimings,
    MonitorPlan,
    PoolPlan,
)
from infra.plan.placement import place, place_on_cluster
from infra.plan.timings import DRAIN_LIMIT_S, explain, explain_aws, explain_kubernetes, timings, values
from infra.plan.traffic import requests_per_month
from infra.plan.work import Largest, Work, on_gpu

if TYPE_CHECKING:
    from infra.catalog.charges import Charge
    from infra.catalog.services import Service
    from infra.config import StackConfig
    from infra.plan.candidates import Ask
    from infra.plan.hosted import Hosted
    from infra.plan.ledger import Ledger
    from infra.plan.model import Timings

DEFAULT_TTFT_P95_S = 5.0
"""What alerts compare with where no promise is made: a chat that says nothing for longer feels broken."""
DEFAULT_GATEWAYS = 2
"""One serves while the other is replaced."""
PORTS = {
    "gateway": 8080,
    "gateway-stats": 8404,
    "gateway-peers": 8405,
    "agent": 9190,
    "prometheus": 9090,
    "alertmanager": 9093,
    "grafana": 3000,
}
"""Each service has its own machines: the usual ports."""
AWS_PORTS = {"gateway-names": 8406}
"""What only gateways on AWS have: a nameserver on loopback."""
EVERYWHERE = "0.0.0.0"  # noqa: S104 - the security group decides who reaches it


@dataclass(frozen=True)
class Sized:
    """What the gateway has to know of one model."""

    context: int
    concurrency: int
    engines: int


@dataclass
class _Pool:
    """A pool while it is planned."""

    name: str
    wanted: PoolConfig
    asks: dict[str, Ask] = field(default_factory=dict)
    chosen: dict[str, Chosen] = field(default_factory=dict)
    plan: PoolPlan | None = None


@dataclass(frozen=True)
class GpuPlanner:
    """Decides everything about a fleet on GPUs. What it refuses is in the ledger."""

    stack: str
    config: StackConfig
    world: World
    services: Mapping[str, Service]
    charges: Mapping[str, Charge]
    hosted: Sequence[Hosted]
    version: str
    """Of vLLM."""
    ledger: Ledger

    def plan(self) -> FleetPlan:
        """The whole plan.

        Raises:
            ConfigError: It cannot be.
        """
        pools = self._pools()
        for pool in pools.values():
            if len(pool.asks) > 1:
                pool.asks = {name: replace(ask, shares=True) for name, ask in pool.asks.items()}
            self._choose(pool)
            self._place(pool)
        placed = {pool.name: pool.plan for pool in pools.values() if pool.plan}
        chosen = {name: one for pool in pools.values() if pool.plan for name, one in pool.chosen.items()}
        engines = {model: count for plan in placed.values() for model, count in plan.engines}
        chosen = {name: self._drainable(one) for name, one in chosen.items()}
        works = {name: self._work(one) for name, one in chosen.items()}
        if not works:
            self.ledger.settle()
        ttft = self._ttft()
        derived = timings(self._explained(explain(list(works.values()), ttft)))
        aws, kubernetes = self._machines(derived, placed)
        self._check_work(works, pools, aws)
        sized = {name: Sized(one.ask.context, one.best.concurrency, engines[name]) for name, one in chosen.items()}
        rates = {name: engines[name] * one.speed.requests_s for name, one in chosen.items()}
        gateway = plan_gateway(
            *(self.config, sized, PORTS | (AWS_PORTS if self.world.region else {}), derived, self.ledger),
            bind=EVERYWHERE,
            rates=rates,
            srv_name=self._srv_name(),
            audio=listening((one.model_plan() for one in chosen.values()), self.world.lock),
            hosts=self.config.gateway.hosts or DEFAULT_GATEWAYS,
        )
        if aws:
            gateway = gateway.model_copy(update={"proxy_protocol": True})  # the load balancer says who the client is
        on_aws = self._on_aws(list(placed.values()), gateway)
        cost = self._cost(placed, chosen, engines, on_aws)
        self.ledger.settle()
        for one in chosen.values():
            explain_model(one, self.world, self.ledger)
            if engines[one.ask.model] == 1:
                down = derived.drain_s + derived.stop_s + derived.start_s
                self.ledger.note(
                    f"models.{one.ask.model}.engines",
                    f"one engine: an update means that `{one.ask.model}` is down for up to {down} s",
                )
        return FleetPlan(
            stack=self.stack,
            target=self.config.target,
            vllm_version=self.version,
            models=tuple(one.model_plan() for one in chosen.values()),
            engines=(),
            gateway=gateway,
            agent=AgentPlan(port=PORTS["agent"]),
            monitor=MonitorPlan(
                prometheus_port=PORTS["prometheus"],
                alertmanager_port=PORTS["alertmanager"],
                grafana_port=PORTS["grafana"],
                thresholds=thresholds(self.config, sized, ttft),
            ),
            timings=derived,
            memory=None,
            region=self.world.region or None,
            engine_sets=tuple(
                self._engines(chosen[model], plan.name, count, derived)
                for plan in placed.values()
                for model, count in plan.engines
            ),
            pools=tuple(placed.values()),
            aws=aws,
            kubernetes=kubernetes,
            on_aws=on_aws,
            cost=cost,
            choices=tuple(row for one in chosen.values() for row in explain_choice(one.choice)),
            notices=tuple(self.ledger.notices),
            origins=tuple(self.ledger.origins),
        )

    # Pools.

    def _pools(self) -> dict[str, _Pool]:
        """Every pool with what is asked of it. Without pools each GPU that is chosen becomes one."""
        pools = {name: _Pool(name, wanted) for name, wanted in self.config.pools.items()}
        for name, wanted in self.config.models.items():
            pool = self._pool_of(name, pools)
            ask = ask_of(name, wanted, self.config.slo, self.world, self.ledger)
            if pool and ask:
                pool.asks[name] = replace(ask, pool=pool.name)
        for pool in pools.values():
            if not pool.asks:  # what is wrong with it itself is said all the same
                self._gpus(pool)
        return {name: pool for name, pool in pools.items() if pool.asks}

    def _pool_of(self, model: str, pools: dict[str, _Pool]) -> _Pool | None:
        at, wanted = f"models.{model}.pool", self.config.models[model].pool
        if wanted is not None:
            if wanted in pools:
                self.ledger.given(at, wanted)
                return pools[wanted]
            fix = did_you_mean(wanted, pools) if pools else f"add `pools: {{{wanted}: {{gpu: …}}}}`"
            self.ledger.refuse(at, f"there is no pool {show(wanted)}", fix)
            return None
        if len(pools) == 1 and self.config.pools:
            (only,) = pools.values()
            self.ledger.because(at, only.name, "the only pool")
            return only
        if self.config.pools:
            self.ledger.refuse(at, "is missing, and there are several pools", f"one of: {', '.join(self.config.pools)}")
            return None
        if not self.world.region:
            fix = "add `pools: {gpus: {gpu: h100-80gb}}` with the GPU that the cluster's nodes have"
            self.ledger.refuse("pools", "is missing: only you know which GPUs the cluster has", fix)
            return None
        self.ledger.because(at, model, "no pools in the stack file: each model gets its own")
        return pools.setdefault(model, _Pool(model, PoolConfig()))

    def _gpus(self, pool: _Pool) -> tuple[str, ...]:
        """The GPUs that a pool may have: none if the config names one that is not known."""
        at, wanted, gpus = f"pools.{pool.name}", pool.wanted, self.world.gpus
        if wanted.gpu is not None:
            if wanted.gpu not in gpus:
                self.ledger.refuse(
                    f"{at}.gpu", f"{show(wanted.gpu)} is not in the catalog", did_you_mean(wanted.gpu, gpus)
                )
                return ()
            self.ledger.given(f"{at}.gpu", wanted.gpu)
            return (wanted.gpu,)
        if wanted.instance is not None and self.world.region:
            if wanted.instance not in self.world.instances:
                fix = did_you_mean(wanted.instance, self.world.instances)
                self.ledger.refuse(f"{at}.instance", f"{show(wanted.instance)} is not in the catalog", fix)
                return ()
            gpu = self.world.instances[wanted.instance].gpu
            self.ledger.because(f"{at}.gpu", gpu, f"what {wanted.instance} has")
            return (gpu,)
        if not self.world.region:
            fix = f"the GPU that the cluster's nodes have, one of: {', '.join(gpus)}"
            self.ledger.refuse(f"{at}.gpu", "is missing: only you know which GPUs the cluster has", fix)
            return ()
        return tuple(gpus)

    def _choose(self, pool: _Pool) -> None:
        """A candidate for every model of a pool, all on the same GPU."""
        gpus = self._gpus(pool)
        if not gpus:
            return
        if len(gpus) > 1 and len(pool.asks) > 1:
            gpus = (self._shared_gpu(pool, gpus),)
        for name, ask in pool.asks.items():
            wanted = self.config.models[name]
            if chosen := choose_model(ask, wanted, gpus, pool.wanted, self.world, self.ledger):
                pool.chosen[name] = chosen

    def _shared_gpu(self, pool: _Pool, gpus: Sequence[str]) -> str:
        """The GPU on which the models of a pool cost least together."""

        def price(gpu: str) -> tuple[int, float]:
            found = [
                ranked(ask, limits(self.config.models[name], (gpu,)), pool.wanted, self.world)[0]
                for name, ask in pool.asks.items()
            ]
            costs = [best.usd_per_hour or 0.0 for best in found if not best.obstacle]
            return -len(costs), sum(costs)

        return min(gpus, key=price)

    def _place(self, pool: _Pool) -> None:
        if not pool.chosen or len(pool.chosen) < len(pool.asks):
            return
        demands = [one.demand(self.world) for one in pool.chosen.values()]
        gpu = next(iter(pool.chosen.values())).best.gpu
        if not pool.wanted.gpu and not pool.wanted.instance:
            self.ledger.because(f"pools.{pool.name}.gpu", gpu, "the cheapest for its models: see the choices")
        if self.world.region:
            pool.plan = place(
                pool.name, pool.wanted, gpu, self.world.instances, self.world.region, demands, self.ledger
            )
        else:
            pool.plan = place_on_cluster(pool.name, pool.wanted, gpu, demands, self.ledger)

    # Timings.

    def _srv_name(self) -> str:
        """Where the ready engines of a model are registered: a namespace of Cloud Map, or a headless Service."""
        if self.config.target == "aws":
            return f"_{{model}}._tcp.{self.stack}.internal"
        return f"_http._tcp.{{model}}.{self.stack}.svc.cluster.local"

    def _ttft(self) -> float:
        given = self.config.slo.ttft_p95
        ttft = given or DEFAULT_TTFT_P95_S
        self.ledger.because("slo.ttft_p95", f"{ttft:g}s", "written in the stack file" if given else "default")
        return ttft

    def _work(self, one: Chosen) -> Work:
        batch = max(one.ask.context, one.best.concurrency * one.ask.typical)
        largest = Largest(one.ask.context, batch, one.max_answer, one.engine.batched_tokens)
        return on_gpu(largest, one.speed, one.engine.weights_bytes, self.world.start, eager=one.ask.eager)

    def _drainable(self, one: Chosen) -> Chosen:
        """The model with answers that a drain on AWS can wait for, where nobody said how long they may be."""
        at, work = f"models.{one.ask.model}.max-answer", self._work(one)
        if one.wanted.max_answer is not None:
            self.ledger.given(at, one.wanted.max_answer)
            return one
        longest = work.answer_within(DRAIN_LIMIT_S)
        if not self.world.region or max(work.generation, work.silence) <= DRAIN_LIMIT_S or longest == 0:
            self.ledger.because(at, one.max_answer, "the context")
            return one
        self.ledger.because(at, longest, f"what is whole in {DRAIN_LIMIT_S} s: AWS lets no drain wait for longer")
        return replace(one, wanted=one.wanted.model_copy(update={"max_answer": longest}))

    def _explained(self, explained: Mapping[str, tuple[int | str, str]]) -> Mapping[str, tuple[int | str, str]]:
        for name, (value, reason) in explained.items():
            self.ledger.because(f"timings.{name}", value, reason)
        return explained

    def _machines(
        self, derived: Timings, placed: Mapping[str, PoolPlan]
    ) -> tuple[AwsTimings | None, KubernetesTimings | None]:
        """What only the target has."""
        weights = max((plan.weights_bytes for plan in placed.values()), default=0)
        if self.world.region:
            return AwsTimings.model_validate(
                values(self._explained(explain_aws(derived, weights, self.world.start)))
            ), None
        return None, KubernetesTimings.model_validate(
            values(self._explained(explain_kubernetes(derived, weights, self.world.start)))
        )

    def _check_work(self, works: Mapping[str, Work], pools: Mapping[str, _Pool], aws: AwsTimings | None) -> None:
        """Refuse answers that no drain can wait for; say which are cut on spot nodes."""
        if aws is None:
            return
        for pool in pools.values():
            spot = any(rung.kind == "spot" for rung in pool.plan.rungs) if pool.plan else False
            for name in pool.chosen:
                if name not in works:
                    continue
                check_drain(name, works[name], self.ledger)
                if spot:
                    note_spot(name, works[name], aws, self.ledger)

    def _on_aws(self, pools: Sequence[PoolPlan], gateway: GatewayPlan) -> AwsPlan | None:
        if not self.world.region:
            return None
        return plan_aws(
            *(self.stack, self.config, pools, gateway),
            region=self.world.region,
            hosts=self.config.gateway.hosts or DEFAULT_GATEWAYS,
            instances=self.world.instances,
            services=self.services,
            ledger=self.ledger,
        )

    # Cost.

    def _cost(
        self,
        placed: Mapping[str, PoolPlan],
        chosen: Mapping[str, Chosen],
        engines: Mapping[str, int],
        on_aws: AwsPlan | None,
    ) -> CostPlan | None:
        rented = [rent for plan in placed.values() if (rent := pool_rent(plan))]
        known = len(rented) == len(placed)
        rented += self._hosts()
        pool_by_model = {model: plan.name for plan in placed.values() for model, _ in plan.engines}
        served = [self._served(one, placed[pool_by_model[name]], engines[name]) for name, one in chosen.items()]
        cost = None
        if known and served:
            cost = plan_cost(
                *(rented, served, self.hosted),
                charged=self._charged(on_aws, placed, chosen),
                by_use=by_use(on_aws, self.world.region, self.charges) if on_aws else (),
                fall=fall(list(placed.values())),
            )
        if cost is None and placed:
            self.ledger.note("pools", "the price of the nodes is not known: `usd_per_hour` of each pool tells it")
        if cost:
            note_overload(cost, self.ledger)
        check_budget(cost, self.config.budget, rented, served, self.ledger)
        return cost

    def _charged(
        self, on_aws: AwsPlan | None, placed: Mapping[str, PoolPlan], chosen: Mapping[str, Chosen]
    ) -> tuple[Charged, ...]:
        if on_aws is None:
            return ()
        kept = {one.model_plan().weights for one in chosen.values()}
        found = parts(on_aws, list(placed.values()), [self.world.lock.models[entry].size for entry in sorted(kept)])
        lines, unknown = charged(found, self.world.region, self.charges)
        if unknown:
            self.ledger.note("cost", f"not counted: {', '.join(unknown)}; the catalog has no price in this region")
        return lines

    def _hosts(self) -> list[Rented]:
        if not self.world.region:
            return []
        given = self.config.gateway.hosts
        hosts = given or DEFAULT_GATEWAYS
        reason = "written in the stack file" if given else "two, so that one serves while the other is replaced"
        self.ledger.because("gateway.hosts", hosts, reason)
        found = {
            "gateway": host_rent("gateway", hosts, self.world.region, self.services),
            "monitor": host_rent("monitor", 1, self.world.region, self.services),
        }
        if unknown := [name for name, rent in found.items() if rent is None]:
            self.ledger.note("cost", f"not counted: {', '.join(unknown)}; the catalog has no price in this region")
        return [rent for rent in found.values() if rent]

    def _served(self, one: Chosen, pool: PoolPlan, engines: int) -> Served:
        most = pool.share * capacity(one.speed, engines)
        requests = requests_per_month(one.ask.model, one.wanted.traffic, most, self.ledger)
        return Served(
            model=one.ask.model,
            pool=pool.name,
            engines=engines,
            gpus=one.best.tensor_parallel_size,
            speed=one.speed,
            traffic=Traffic(requests, one.ask.prompt, one.ask.answer),
            share=pool.share,
        )

    def _engines(self, one: Chosen, pool: str, engines: int, derived: Timings) -> EngineSetPlan:
        served = one.best.served
        online = served is not None and served.online
        return EngineSetPlan(
            model=one.ask.model,
            pool=pool,
            engines=engines,
            gpu=one.best.gpu,
            tensor_parallel_size=one.best.tensor_parallel_size,
            flags=gpu_flags(one.model_plan(), one.engine, one.wanted, derived, online=online),
            environment=OFFLINE,
            fit=one.fit_plan(),
            speed=one.speed,
        )
