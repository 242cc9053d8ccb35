// SPDX-License-Identifier: Apache-2.0
// The real SOFARPC of Maven: a provider or a consumer that knows its sidecar (`mesh`) or the registry (`sofa`), and
// nothing of weir. Started by scripts/interop, each in a JVM of its own.
//
//     Sofarpc provider REGISTRY ADDRESS PORT    serves until it is killed
//     Sofarpc consumer REGISTRY ADDRESS CALLS   calls so often, and fails if an answer is wrong
import com.alipay.sofa.rpc.config.ApplicationConfig;
import com.alipay.sofa.rpc.config.ConsumerConfig;
import com.alipay.sofa.rpc.config.ProviderConfig;
import com.alipay.sofa.rpc.config.RegistryConfig;
import com.alipay.sofa.rpc.config.ServerConfig;
import com.alipay.sofa.rpc.core.exception.SofaRpcException;

public class Sofarpc {
    public interface Sum {
        long plus(long a, long b);

        String repeat(String text, int times);
    }

    public static class SumImpl implements Sum {
        public long plus(long a, long b) {
            return a + b;
        }

        public String repeat(String text, int times) {
            return text.repeat(times);
        }
    }

    public static void main(String[] words) throws Exception {
        RegistryConfig registry = new RegistryConfig().setProtocol(words[1]).setAddress(words[2]);
        int number = Integer.parseInt(words[3]);
        if (words[0].equals("provider")) {
            provide(registry, number);
        } else {
            consume(registry, number);
        }
    }

    static void provide(RegistryConfig registry, int port) throws Exception {
        ServerConfig server = new ServerConfig().setProtocol("bolt").setPort(port).setDaemon(false);
        new ProviderConfig<Sum>().setApplication(new ApplicationConfig().setAppName("java-provider"))
            .setInterfaceId(Sum.class.getName()).setRef(new SumImpl()).setServer(server)
            .setRegistry(registry).export();
        System.out.println("provides");
        Thread.sleep(Long.MAX_VALUE);
    }

    static void consume(RegistryConfig registry, int calls) throws Exception {
        Sum sum = new ConsumerConfig<Sum>().setApplication(new ApplicationConfig().setAppName("java-consumer"))
            .setInterfaceId(Sum.class.getName()).setProtocol("bolt").setTimeout(5000)
            .setRegistry(registry).refer();
        await(sum);
        for (int call = 0; call < calls; call++) {
            if (sum.plus(call, 1) != call + 1) {
                throw new AssertionError("call " + call);
            }
        }
        if (!sum.repeat("weir", 50_000).equals("weir".repeat(50_000))) {
            throw new AssertionError("a long answer");
        }
        System.out.println("called " + calls + " times");
        System.exit(0);
    }

    /// The registry's first word may come later than the first call.
    static void await(Sum sum) throws Exception {
        long end = System.nanoTime() + 20_000_000_000L;
        while (true) {
            try {
                sum.plus(1, 1);
                return;
            } catch (SofaRpcException notYet) {
                if (System.nanoTime() > end) {
                    throw notYet;
                }
                Thread.sleep(100);
            }
        }
    }
}
